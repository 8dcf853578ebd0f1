"""Bad inputs and faults: what a server near strangers must survive, one named test each."""
