"""What moves when: `base` is the contract, one file a member."""
