"""Records, and where they are shown while a run goes on."""
