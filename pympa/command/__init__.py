"""Code that command lines share: arguments, one message for all ranks, one exit status."""
