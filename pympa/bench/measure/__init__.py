"""Measured plans: do they fit into memory, are they correct, and how fast are they?"""
