"""Kinds of problem: what outputs and targets mean, one file for each kind.

Start with `protocol`. `registry` lists the built-in kinds; `targets` and `losses` hold what several
of them share; `conform` brings a task's targets to the form that its loss takes.
"""
