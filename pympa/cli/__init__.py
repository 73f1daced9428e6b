"""The console command `pympa`, and its commands that have no package of their own."""
