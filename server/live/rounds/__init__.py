"""Rounds whose clients are real devices: who is a member, and a journal of each step.

Read `journaled` first.
"""
