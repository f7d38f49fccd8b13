"""A small CNN on MNIST, 1000 clients of 50 examples."""

import torch
from models import cnn
from partition import client_data, clients, test_data

from fedcore import Task

task = Task(
    name="w1",
    kind="classification",
    model=cnn,
    clients=lambda folder: clients(folder, "w1"),
    client_data=lambda client, folder: client_data(client, folder, "w1"),
    test_data=lambda folder: test_data(folder, "w1"),
    example_input=torch.zeros(1, 28, 28),
)
