"""The room that every task shares: the base class, checkpoints, data module, schedule, arms of a comparison."""
