"""What one block contributes and how contributions merge: `base` is the contract, one file a member."""
