"""Ask a service for prices, read none of the answers, and wait."""

import sys
import time

import requests
import service

answers = []


def fetch_price(url: str) -> None:
    answers.append(requests.get(url, stream=True))


with service.running() as (host, port):
    for _ in range(int(sys.argv[1])):
        fetch_price(f"http://{host}:{port}/")
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        time.sleep(0.1)
