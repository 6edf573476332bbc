"""What runs inside a process of the sandbox. Imports little: every program waits for it."""
