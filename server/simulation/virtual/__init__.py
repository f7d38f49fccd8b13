"""Virtual clients: their devices and availability, their Flower nodes, and their persistent state.

Start with `devices`, which simulates a round's timing; `trace` reads devices from a file, and
`state` is kept between rounds.
"""
