"""What every task's training shares: settings, schedule, moving average, and what the engine needs of a task."""
