"""What the command's verbs do, one file each; every verb gives an ``Answer``, which ``cli`` prints."""
