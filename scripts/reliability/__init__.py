"""Long checks of what the tests check in short: command lines, interrupts, soaking, mutants."""
