"""What travels between server and client, one file a step, encode beside decode."""
