"""The commands of `so8t`, one module each: `HELP`, its `arguments`, and `run`."""
