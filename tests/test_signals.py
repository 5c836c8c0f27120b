import os
import pickle
import signal
import threading

import pytest

from repvgg.signals import Interrupted, interruptible, stopping
from repvgg.training.divergence import Diverged

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("signum", ALL)
def test_a_signal_interrupts_and_its_handler_is_given_back(signum):
    before = [signal.getsignal(number) for number in ALL]

    with pytest.raises(Interrupted, match=f"stopped by {signum.name}") as stopped, interruptible():
        os.kill(os.getpid(), signum)

    assert stopped.value.signum == signum
    assert [signal.getsignal(number) for number in ALL] == before


def read_by_c_code() -> None:
    """As numpy and torch read an object: what is raised meanwhile becomes an error of theirs."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Interrupted:
        raise ValueError("could not determine the shape") from None


def test_a_signal_that_became_another_error_interrupts_all_the_same():
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
        read_by_c_code()


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="wrong"), interruptible():
        raise ValueError("wrong")


def test_a_hangup_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.SIGHUP not in stopping()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_signals_that_a_system_does_not_have_are_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")

    assert stopping() == [signal.SIGINT, signal.SIGTERM]


def test_nothing_is_installed_outside_of_the_main_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [before]


def test_exceptions_of_a_run_can_be_pickled():
    stopped = pickle.loads(pickle.dumps(Interrupted(15)))
    diverged = pickle.loads(pickle.dumps(Diverged(4, 0.1, "the loss")))

    assert (str(stopped), stopped.signum) == ("stopped by SIGTERM", 15)
    assert str(diverged) == str(Diverged(4, 0.1, "the loss"))
    assert diverged.step == 4
