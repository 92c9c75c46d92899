"""The kernel in C++ for CPUs: this folder, and one line of registration in the one above, are all of it."""
