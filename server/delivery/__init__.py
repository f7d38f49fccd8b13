"""Delivery: serves a release repository to the devices of a project, over gRPC.

In: a signed repository in a folder, and the roster. Out: metadata and files to the devices in
force, word of each change, and reports of what became of a version. Start with `service`.
"""
