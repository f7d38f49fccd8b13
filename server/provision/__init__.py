"""The authority of a project: who takes part, with which key, in which role, until when."""
