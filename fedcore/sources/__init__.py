"""Data that people bring: frames, arrays, Hugging Face data sets and folders of images, by client.

In: one part of the data for each client. Out: a `ClientData`, whose ``task`` makes a `Task`. Start
with `client_data`; there is one file for each source.
"""
