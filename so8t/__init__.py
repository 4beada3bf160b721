"""SO8T: a safe agent out of a frozen 4-bit instruct LLM, by training rotations only."""
