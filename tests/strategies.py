"""Arbitrary values of every stage, for property-based tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import closewait_guard as cwg
from closewait_guard.model import SCHEMA

# How long an example takes says nothing on a busy machine.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

texts = st.text(max_size=20)
seconds = st.floats(0, 1e6, allow_nan=False)
maybe_seconds = st.none() | seconds
counts = st.integers(0, 10**9)
scalars = st.none() | st.booleans() | counts | seconds | texts
contexts = st.dictionaries(texts, scalars, max_size=3)

frames = st.builds(
    cwg.Frame,
    filename=texts,
    lineno=counts,
    function=texts,
    module=texts,
    kind=st.sampled_from(cwg.FrameKind),
    source=st.none() | texts,
)


def records_with(parents):
    return st.builds(
        cwg.SocketRecord,
        serial=st.integers(-(2**63) + 1, 2**63 - 1),
        pid=counts,
        opened_at=maybe_seconds,
        thread=texts,
        task=st.none() | texts,
        labels=st.lists(texts, max_size=3).map(tuple),
        context=contexts,
        origin=st.sampled_from(cwg.Origin),
        parent=parents,
        stack=st.lists(frames, max_size=4).map(tuple),
    )


records = records_with(st.none() | records_with(st.none()))

observations = st.builds(
    cwg.Observation,
    record=records,
    fd=counts,
    inode=st.none() | counts,
    family=st.sampled_from(["AF_INET", "AF_INET6", "AF_UNIX", "AF_VSOCK"]),
    type=st.sampled_from(["SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW"]),
    local=st.none() | texts,
    peer=st.none() | texts,
    state=st.sampled_from(cwg.State),
    evidence=st.sampled_from(cwg.Evidence),
    peer_closed_for=maybe_seconds,
    unread=st.none() | counts,
    last_sent_for=maybe_seconds,
    last_received_for=maybe_seconds,
    tls=st.booleans(),
    close_called=st.booleans(),
    connection=st.sampled_from(cwg.Connection),
    suspect_for=maybe_seconds,
    unsent=st.none() | counts,
    in_use=st.booleans(),
    checkout=st.none()
    | st.builds(
        cwg.Checkout,
        library=texts,
        pool=texts,
        out=st.integers(1, 10**9),
        max_size=st.none() | counts,
        seconds=seconds,
    ),
    unanswered=st.none()
    | st.builds(cwg.Unanswered, seconds=seconds, attempts=st.integers(1, 10**9), heard_for=seconds),
)

leaks = st.builds(
    cwg.Finding,
    observation=observations,
    verdict=st.sampled_from(cwg.Verdict),
    severity=st.sampled_from(cwg.Severity),
    holders=st.lists(texts, max_size=2).map(tuple),
    hint=texts,
    code=texts,
    package=texts,
    via=texts,
    caller=texts,
)

alerts = st.builds(
    cwg.Alert,
    kind=st.sampled_from(cwg.AlertKind),
    severity=st.sampled_from(cwg.Severity),
    message=texts,
    data=contexts,
    status=st.sampled_from(cwg.AlertStatus),
    code=texts,
)

coverages = st.builds(
    cwg.Coverage,
    opened=counts,
    adopted=counts,
    dropped=counts,
    forgotten=counts,
    failures=counts,
    notes=st.lists(texts, max_size=2).map(tuple),
)

named_counts = st.dictionaries(texts, st.integers(1, 10**9), max_size=3)
descriptors = st.builds(
    cwg.Descriptors,
    total=counts,
    by_kind=named_counts,
    names=st.dictionaries(texts, named_counts, max_size=2),
    counted_for=seconds,
)

reports = st.builds(
    cwg.Report,
    schema=st.just(SCHEMA),
    taken_at=seconds,
    host=texts,
    pid=counts,
    command=texts,
    python=texts,
    open_sockets=counts,
    fd_used=st.none() | counts,
    fd_limit=st.none() | counts,
    coverage=coverages,
    findings=st.lists(leaks, max_size=3).map(tuple),
    alerts=st.lists(alerts, max_size=2).map(tuple),
    observations=st.lists(observations, max_size=2).map(tuple),
    closed_late=st.lists(st.builds(cwg.ClosedLate, finding=leaks, after=seconds), max_size=2).map(
        tuple
    ),
    omitted=counts,
    descriptors=st.none() | descriptors,
    full_pools=st.lists(
        st.builds(
            cwg.FullPool,
            name=texts,
            max_size=counts,
            full_for=seconds,
            oldest_for=seconds,
            sites=named_counts,
        ),
        max_size=2,
    ).map(tuple),
    open_at_end=st.lists(
        st.builds(cwg.OpenAtEnd, name=texts, count=counts, place=texts, processes=counts),
        max_size=2,
    ).map(tuple),
    redacted=st.booleans(),
)

settings = st.builds(
    lambda ages, **others: cwg.Settings(age_warning=ages[0], age_critical=ages[1], **others),
    ages=st.tuples(seconds, seconds).map(sorted),
    grace=seconds,
    half_close_idle=seconds,
    count_warning=counts,
    fd_share_critical=st.floats(0.01, 1),
)
