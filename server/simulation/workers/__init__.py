"""Workers that train virtual clients: take a round's task, return replies or partial sums.

Start with `executor`, the interface. Workers run in this process, in a `process_pool`, or on a Ray
cluster; `scheduler` chooses.
"""
