"""What other systems plug in: web frameworks, servers, metrics. One file each.

Each file imports its own library, and nothing else in the package imports any of them.
"""
