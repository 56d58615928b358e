"""Commands, talks and files on a real sshd, and every way in which a connection fails."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sshd import SFTP, is_running, logged_in_from, make_key, serving

from vitprune.errors import InputError, MissingError
from vitprune_deploy.remote import _login
from vitprune_deploy.remote.connection import Completed, Connection, Lost, UnknownHostKey
from vitprune_deploy.remote.host import parse_host

BYTES = 5 * 10**6
PYTHON = shlex.quote(sys.executable)
ECHO = f"{PYTHON} -uc 'for line in __import__(\"sys\").stdin: print(line.strip()[::-1])'"


@pytest.fixture
def board(sshd):
    with Connection.open(sshd.host) as connection:
        yield connection


@pytest.fixture
def file(tmp_path) -> Path:
    """5 MB that do not repeat."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(BYTES))
    return path


@contextlib.contextmanager
def killing(sshd, after_s):
    """Inside, the connections are cut ``after_s`` from now."""
    timer = threading.Timer(after_s, sshd.kill_connections)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


def test_a_command_gives_what_it_wrote_and_its_code(board):
    assert board.run("echo grüße; echo 2 >&2; exit 3", timeout_s=20) == Completed("grüße\n", "2\n", 3)
    assert board.run("cat", stdin="über\n", timeout_s=20) == Completed("über\n", "", 0)
    assert board.run("cat", timeout_s=20) == Completed("", "", 0)  # its input is at its end, not left open
    assert board.run("true", stdin="x" * 10**6, timeout_s=20).code == 0
    assert board.run("kill -9 $$", timeout_s=20) == Completed("", "", -9)


def test_more_output_than_a_window_holds_comes_whole(board):
    done = board.run(f"{PYTHON} -c 'print(\"x\" * (5 << 20))'", timeout_s=30)
    assert len(done.stdout) == (5 << 20) + 1


def has_ended(command):
    """Whether no process is left that was started as ``command``, or will be in a moment."""
    end_s = time.monotonic() + 5
    while is_running(command) and time.monotonic() < end_s:
        time.sleep(0.05)
    return not is_running(command)


def test_a_command_that_takes_too_long_is_stopped_with_its_children(board):
    sleep = f"sleep {os.getpid()}.1"
    with pytest.raises(MissingError, match=rf"`{sleep}; echo done` took longer than 0\.3 s on ssh://"):
        board.run(f"{sleep}; echo done", timeout_s=0.3)
    assert has_ended(sleep)
    assert board.run("echo on", timeout_s=20).stdout == "on\n"


def test_an_interrupted_command_is_stopped_before_the_connection_ends(sshd):
    sleep = f"sleep {os.getpid()}.3"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may have its own

    def work():
        with Connection.open(sshd.host) as board:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            board.run(sleep, timeout_s=20)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert has_ended(sleep)


def test_what_still_runs_ends_with_the_connection(sshd):
    sleep = f"sleep {os.getpid()}.4"
    with Connection.open(sshd.host) as board:
        board.start(sleep)
    assert has_ended(sleep)


def test_a_talk_answers_line_by_line(board):
    talk = board.start(f"echo ready >&2; {ECHO}")
    assert talk.ask("abc", 20) == "cba"
    assert talk.ask("größe", None) == "eßörg"
    long = "0123456789" * 300_000  # more than asyncssh's window of 2 MiB
    assert talk.ask(long, 60) == long[::-1]
    assert talk.said == ("ready",)
    talk.close()
    with pytest.raises(MissingError, match="in place of an answer"):
        talk.ask("again", 5)


def test_talks_and_commands_go_side_by_side_from_several_threads(board):
    talks = [board.start(ECHO) for _ in range(3)]
    answers = {}

    def work(number):
        answers[number] = [talks[number].ask(f"{number}{i}", 20) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    assert board.run("echo 1", timeout_s=20).stdout == "1\n"
    for thread in threads:
        thread.join()
    assert answers == {number: [f"{number}{i}"[::-1] for i in range(20)] for number in range(3)}


def test_a_process_that_ends_instead_of_answering_is_told_with_code_and_last_line(board):
    talk = board.start("read line; echo first >&2; echo 'ImportError: no numpy' >&2; exit 7")
    with pytest.raises(
        MissingError, match=r"ended with code 7 in place of an answer: ImportError: no numpy$"
    ) as caught:
        talk.ask("x", 20)
    assert not isinstance(caught.value, Lost)
    assert talk.said == ("first", "ImportError: no numpy")
    assert board.run("echo on", timeout_s=20).code == 0


def test_half_a_line_is_no_answer(board):
    with pytest.raises(MissingError, match="ended with code 0 in place of an answer"):
        board.start("read line; printf half").ask("x", 20)


def test_a_late_answer_ends_the_talk(board):
    talk = board.start("read line; sleep 1; echo late; cat")
    with pytest.raises(MissingError, match=r"no answer from ssh://\S+ within 0\.2 s; the process there was stopped"):
        talk.ask("x", 0.2)
    with pytest.raises(MissingError, match="in place of an answer"):
        talk.ask("y", 5)


def test_closing_a_talk_ends_a_process_that_reads_and_one_that_does_not(board, monkeypatch, tmp_path):
    monkeypatch.setattr("vitprune_deploy.remote._talk.CLOSE_S", 0.3)
    board.start(f"cat; touch {tmp_path}/read-to-the-end").close()
    assert (tmp_path / "read-to-the-end").exists()
    sleep = f"sleep {os.getpid()}.2"
    board.start(sleep).close()
    assert has_ended(sleep)


def test_files_arrive_whole_in_both_directions_and_progress_is_told(board, file, tmp_path):
    told = []
    there = tmp_path / "board" / "file name"
    there.parent.mkdir()
    board.send(file, str(there), lambda done, total: told.append((done, total)))
    assert there.read_bytes() == file.read_bytes()
    assert told[-1] == (BYTES, BYTES)
    assert len(told) > 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    board.fetch(str(there), tmp_path / "back" / "file")
    assert (tmp_path / "back" / "file").read_bytes() == file.read_bytes()
    file.write_bytes(b"")
    board.send(file, str(there))  # in place of the old one, and empty
    assert there.read_bytes() == b""
    board.fetch(str(there), tmp_path / "back" / "file")
    assert (tmp_path / "back" / "file").read_bytes() == b""
    assert leftovers(there.parent) + leftovers(tmp_path / "back") == []


def test_the_home_is_where_commands_begin(board):
    assert board.home() == board.run("pwd", timeout_s=20).stdout.strip()


def test_a_folder_or_file_that_is_not_there_or_closed_is_told(board, file, tmp_path):
    with pytest.raises(InputError, match=f"there is no folder {tmp_path}/no on ssh://"):
        board.send(file, f"{tmp_path}/no/file")
    with pytest.raises(InputError, match=r"/sys on ssh://\S+ cannot be written to \(permission denied\)"):
        board.send(file, "/sys/file")  # closed to root as well
    with pytest.raises(InputError, match=f"there is no file {tmp_path}/no on ssh://"):
        board.fetch(f"{tmp_path}/no", tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        board.send(tmp_path / "no", f"{tmp_path}/file")
    assert not (tmp_path / "back").exists()
    assert leftovers(tmp_path) == []
    assert board.run("echo on", timeout_s=20).code == 0


def test_a_name_taken_by_a_folder_leaves_nothing_behind(board, file, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(MissingError, match=f"{tmp_path}/there on ssh://.* cannot be transferred by SFTP"):
        board.send(file, f"{tmp_path}/there")
    assert leftovers(tmp_path) == []
    board.send(file, f"{tmp_path}/elsewhere")
    assert (tmp_path / "elsewhere").stat().st_size == BYTES


def test_a_full_disk_is_told_with_what_is_free(board, file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(
            MissingError, match=r"no room left on the disk of \S+ on ssh://\S+: 5\.0 MB are to be written"
        ):
            board.send(file, f"{small}/file")
        assert list(small.iterdir()) == []
        file.write_bytes(b"small")
        board.send(file, f"{small}/file")
        assert (small / "file").read_bytes() == b"small"
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_connection_cut_in_the_middle_of_an_answer_is_lost(board, sshd):
    talk = board.start("read line; sleep 30")
    with killing(sshd, 0.3), pytest.raises(Lost, match=f"the connection to {sshd.address} was lost; once it is back"):
        talk.ask("x", None)
    for work in (lambda: talk.ask("y", 5), lambda: board.run("true", timeout_s=5), lambda: board.start("cat")):
        with pytest.raises(Lost):
            work()
    talk.close()


def test_a_connection_cut_in_the_middle_of_a_command_is_lost(board, sshd):
    with killing(sshd, 0.3), pytest.raises(Lost):
        board.run("sleep 30", timeout_s=20)


def test_a_board_that_goes_down_ends_the_process_first_and_the_connection_is_lost(board, sshd):
    talk = board.start("read line; kill -TERM $$")
    with killing(sshd, 0.4), pytest.raises(Lost):
        talk.ask("x", 20)


def test_a_connection_cut_in_the_middle_of_sending_is_lost_and_the_file_is_not_there(board, sshd, file, tmp_path):
    with pytest.raises(Lost):
        board.send(file, f"{tmp_path}/there", lambda done, total: sshd.kill_connections())
    assert not (tmp_path / "there").exists()
    for work in (lambda: board.send(file, f"{tmp_path}/there"), board.home):
        with pytest.raises(Lost):
            work()


def test_a_connection_cut_in_the_middle_of_fetching_is_lost_and_the_old_file_stays(board, sshd, tmp_path):
    (tmp_path / "here").write_text("old")
    with killing(sshd, 0.3), pytest.raises(Lost):
        board.fetch("/dev/zero", tmp_path / "here")
    assert (tmp_path / "here").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_board_that_says_nothing_more_is_lost(sshd, monkeypatch):
    monkeypatch.setattr(_login, "KEEPALIVE_S", 0.2)
    with Connection.open(sshd.host) as board:
        board.run("true", timeout_s=20)  # only now sshd has all the processes that it will have
        sshd.server.kill_connections(signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(Lost):
            board.run("true", timeout_s=20)
        assert time.monotonic() - started_s < 10
        sshd.kill_connections()


def test_an_unknown_host_key_is_shown_and_nothing_is_sent(sshd):
    sshd.forget_host()
    with pytest.raises(UnknownHostKey) as caught:
        Connection.open(sshd.host)
    assert str(caught.value) == (
        f"the host key of {sshd.address} is not known here; run `vitprune-deploy devices add NAME {sshd.address}`, "
        "which shows its fingerprint"
    )
    assert caught.value.key.fingerprint == sshd.server.fingerprint
    assert f"{caught.value.key.label} {caught.value.key.public}\n" == sshd.server.known_host


def test_host_keys_of_the_users_own_file_are_trusted(sshd):
    sshd.forget_host()
    (sshd.home / ".ssh" / "known_hosts").write_text(f"# mine\nother ssh-ed25519 AAAA\n{sshd.server.known_host}")
    with Connection.open(sshd.host) as board:
        assert board.fingerprint == sshd.server.fingerprint


@pytest.mark.parametrize("setting", ["UserKnownHostsFile none", "StrictHostKeyChecking no"])
def test_no_setting_switches_the_check_of_host_keys_off(sshd, setting):
    sshd.forget_host()
    with (sshd.home / ".ssh" / "config").open("a") as config:
        config.write(f"    {setting}\n")
    with pytest.raises(UnknownHostKey):
        Connection.open(sshd.host)


@pytest.mark.parametrize("own", [True, False])
def test_a_host_key_that_has_changed_is_refused_with_the_command_that_forgets_the_old_one(sshd, tmp_path, own):
    make_key(tmp_path / "other")
    public = (tmp_path / "other.pub").read_text()
    sshd.forget_host()
    file = sshd.config_dir / "known_hosts" if own else sshd.home / ".ssh" / "known_hosts"
    file.write_text(f"[127.0.0.1]:{sshd.host.port} {public}")
    with pytest.raises(MissingError, match="has changed: it is not the one in") as caught:
        Connection.open(sshd.host)
    assert not isinstance(caught.value, UnknownHostKey)
    command = str(caught.value).split("`")[1]
    assert command.startswith("ssh-keygen -R ")
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    with pytest.raises(UnknownHostKey):
        Connection.open(sshd.host)


def test_a_revoked_host_key_is_refused(sshd):
    (sshd.config_dir / "known_hosts").write_text(f"{sshd.server.known_host}@revoked {sshd.server.known_host}")
    with pytest.raises(MissingError, match=r"is not trusted \(Host key is revoked"):
        Connection.open(sshd.host)


def test_a_damaged_file_of_known_hosts_is_told_with_its_name(sshd):
    (sshd.config_dir / "known_hosts").write_text("nonsense\n")
    with pytest.raises(
        InputError, match=f"{sshd.config_dir}/known_hosts: Invalid known hosts entry: nonsense; correct"
    ):
        Connection.open(sshd.host)


@pytest.mark.parametrize("passphrase", ["", "hunter2"])
def test_a_user_whose_keys_are_not_accepted_is_told_how_to_get_one_there(sshd, tmp_path, passphrase):
    make_key(tmp_path / "other", passphrase=passphrase)
    (sshd.home / ".ssh" / "config").write_text(f"Host *\n    IdentityFile {tmp_path}/other\n")
    with pytest.raises(MissingError) as caught:
        Connection.open(sshd.host)
    assert str(caught.value) == (
        f"{sshd.address} accepts none of your keys; put one there with `ssh-copy-id -p {sshd.host.port} "
        f"{sshd.host.user}@127.0.0.1`, and load one that has a passphrase with `ssh-add`"
    )


def test_more_keys_than_the_server_tries_are_told_as_none_accepted(sshd, tmp_path):
    lines = ["Host *"]
    for number in range(7):  # MaxAuthTries is 6
        make_key(tmp_path / f"key{number}")
        lines.append(f"    IdentityFile {tmp_path}/key{number}")
    (sshd.home / ".ssh" / "config").write_text("\n".join(lines))
    with pytest.raises(MissingError, match="accepts none of your keys"):
        Connection.open(sshd.host)


def test_the_settings_of_ssh_name_host_port_and_user(sshd):
    host = sshd.host
    with (sshd.home / ".ssh" / "config").open("a") as config:
        config.write(f"Host orin\n    HostName {host.name}\n    Port {host.port}\n    User {host.user}\n")
    with Connection.open(parse_host("ssh://orin")) as board:
        assert board.run("echo on", timeout_s=20).stdout == "on\n"


def test_an_agent_has_the_key_whose_file_nobody_may_read(sshd, tmp_path, monkeypatch):
    (sshd.home / ".ssh" / "config").unlink()
    with pytest.raises(MissingError, match="accepts none of your keys"):
        Connection.open(sshd.host)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        while not (tmp_path / "agent").exists():
            assert agent.poll() is None
        subprocess.run(["ssh-add", "-q", sshd.server.folder / "user_key"], check=True)
        Connection.open(sshd.host).close()
    finally:
        agent.terminate()
        agent.wait()


def test_a_board_behind_another_host_is_reached_through_it(sshd):
    (sshd.home / ".ssh" / "known_hosts").write_text(sshd.server.known_host)
    with (sshd.home / ".ssh" / "config").open("a") as config:
        config.write(f"    HostName 127.0.0.1\n    Port {sshd.host.port}\nHost inner\n    ProxyJump outer\n")
    log = sshd.server.folder / "log"
    before = log.read_text().count("Accepted publickey")
    with Connection.open(parse_host("ssh://inner")) as board:
        assert board.run("echo on", timeout_s=20).stdout == "on\n"
    assert log.read_text().count("Accepted publickey") == before + 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("Host *\n    Port none\n", "the settings or keys in ~/.ssh cannot be used"),
        (
            "Host *\n    IdentityFile /no/such/key\n",
            "/no/such/key cannot be read .* and the settings in ~/.ssh name it",
        ),
        ("Host *\n    IdentityFile /etc/hostname\n", "the settings or keys in ~/.ssh cannot be used"),
    ],
)
def test_settings_that_cannot_be_used_are_told(sshd, settings, said):
    (sshd.home / ".ssh" / "config").write_text(settings)
    with pytest.raises(InputError, match=said):
        Connection.open(sshd.host._replace(port=None))


def test_a_name_that_does_not_resolve_is_told(sshd):
    with pytest.raises(MissingError, match=r"the name no-such-board.invalid cannot be resolved; correct it, or give"):
        Connection.open(parse_host("ssh://no-such-board.invalid"))


def test_a_closed_port_is_told(sshd):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(MissingError, match=f"refuses connections on port {port}; does sshd run there"):
            Connection.open(parse_host(f"ssh://127.0.0.1:{port}"))


def test_a_host_that_does_not_answer_is_told(sshd):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(MissingError, match=r"did not answer within 0\.3 s; is it on"):
            Connection.open(parse_host(f"ssh://127.0.0.1:{silent.getsockname()[1]}"), timeout_s=0.3)


def test_what_is_no_ssh_server_is_told(sshd):
    with socket.create_server(("127.0.0.1", 0)) as web:

        def answer():
            with web.accept()[0] as client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MissingError, match=r"ended the connection before the login .*; is that an ssh server"):
            Connection.open(parse_host(f"ssh://127.0.0.1:{web.getsockname()[1]}"))
        thread.join()


def test_a_user_who_may_only_copy_files_copies_files(tmp_path, monkeypatch, file):
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", f"{SFTP}\nForceCommand internal-sftp") as server:
        sshd = logged_in_from(server, tmp_path, monkeypatch)
        with Connection.open(sshd.host) as board:
            board.send(file, f"{tmp_path}/there")
            (tmp_path / "folder").mkdir()
            with pytest.raises(MissingError, match=r"folder on .* cannot be transferred by SFTP"):
                board.send(file, f"{tmp_path}/folder")
    assert (tmp_path / "there").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("more", ["", "Subsystem sftp /no/such/server", "Subsystem sftp /bin/echo welcome"])
def test_a_board_without_sftp_is_told_what_to_install(tmp_path, monkeypatch, file, more):
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", more) as server:
        sshd = logged_in_from(server, tmp_path, monkeypatch)
        with Connection.open(sshd.host) as board:
            with pytest.raises(MissingError, match="has no SFTP; install openssh-sftp-server there, or write"):
                board.send(file, f"{tmp_path}/there")
            assert board.run("echo on", timeout_s=20).stdout == "on\n"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("MaxSessions 0", "open failed"),
        ("ForceCommand echo This account is not available.; exit 1", "This account is not available."),
        ("ForceCommand true", "it ends at once"),
    ],
)
def test_a_board_that_runs_no_commands_is_told(tmp_path, monkeypatch, more, why):
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", f"{SFTP}\n{more}") as server:
        sshd = logged_in_from(server, tmp_path, monkeypatch)
        with (
            Connection.open(sshd.host) as board,
            pytest.raises(MissingError, match=f"runs no commands for this user .*{why}"),
        ):
            board.start("cat")


def test_what_a_shell_says_before_a_command_is_not_taken_for_its_answer(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", 'ForceCommand echo hello; printf hi; eval "$SSH_ORIGINAL_COMMAND"') as server:
        sshd = logged_in_from(server, tmp_path, monkeypatch)
        with Connection.open(sshd.host) as board:
            assert board.run("echo on", timeout_s=20).stdout == "on\n"
            assert board.start(ECHO).ask("abc", 20) == "cba"


def test_a_forked_process_has_a_connection_of_its_own(board, sshd):
    assert board.run("echo parent", timeout_s=20).stdout == "parent\n"
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException), Connection.open(sshd.host) as own:
            code = own.run("exit 42", timeout_s=20).code
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert board.run("echo parent", timeout_s=20).stdout == "parent\n"
