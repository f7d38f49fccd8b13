"""The same task with a GPT that a processor trains in minutes."""

from task import made

task = made("shakespeare-small", length=64, width=64, heads=4, blocks=2)  # 110,000 parameters
