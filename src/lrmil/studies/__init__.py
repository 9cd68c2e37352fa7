"""Studies of what the method does to an encoder, on data anyone can make or download: probes and negative controls."""
