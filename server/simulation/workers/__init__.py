"""Who trains virtual clients: tasks of a round in, partial sums out.

Read `executor` first: workers in this process, in processes of their own, or on a Ray cluster.
"""
