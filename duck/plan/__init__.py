"""What a run should reach before it runs: closed forms, and a simulation of a decode step."""
