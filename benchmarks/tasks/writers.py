"""A small CNN on MNIST, each of 539 writers a client with as many examples as they wrote."""

import torch
from models import cnn
from partition import client_data, clients, test_data

from fedcore import Task

task = Task(
    name="writers",
    kind="classification",
    model=cnn,
    clients=lambda folder: clients(folder, "writers"),
    client_data=lambda client, folder: client_data(client, folder, "writers"),
    test_data=lambda folder: test_data(folder, "writers"),
    example_input=torch.zeros(1, 28, 28),
)
