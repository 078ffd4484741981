"""A decoder's whole step in one C call on packed weights: for CPUs."""
