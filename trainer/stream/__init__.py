"""What comes in: prompts are leased, groups are received, buffered within the staleness bound, and packed. No torch."""
