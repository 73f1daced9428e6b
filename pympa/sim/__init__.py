"""Steps on virtual clocks: the strategies' own code, timed by kernel costs and links."""
