"""The benchmark's workloads as a user of fedcore would write them: task files and run files."""
