"""Benchmarks: each is a program, ``python -m benchmarks.NAME``; `make bench NAME=...` runs one."""
