"""Serves installed models to other programs over the Open Inference Protocol (KServe v2).

Requests come in over gRPC and HTTP, are checked against the signed manifest, wait in a bounded
queue, run in batches, and go out as answers that name the version that made them. Nothing is kept
of an input. Start with `edge_client.serving.run.serve`; `edge_client.serving.protocol` has the
terms that both transports share.
"""
