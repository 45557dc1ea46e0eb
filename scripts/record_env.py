"""Run `worldmodel record`."""

from worldmodel.commands.main import run_command

if __name__ == "__main__":
    run_command("record")
