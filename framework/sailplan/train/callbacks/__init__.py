"""The callbacks that come with the package; `conf/callback/` has a file for each."""
