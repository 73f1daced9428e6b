"""Tables and timelines that show records to the user."""
