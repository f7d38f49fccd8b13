"""Local optimisation, shared by devices, the simulation and the cloud."""
