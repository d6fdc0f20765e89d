"""How ranks start, which groups they form, named seeds, signals and the watchdog."""
