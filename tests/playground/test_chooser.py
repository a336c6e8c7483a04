"""Where a large clip's link leads."""

from capkit.playground.chooser import server_link


def test_a_link_leads_to_the_server_that_started_the_kernel(monkeypatch, tmp_path):
    servers = [
        {"pid": 7, "root_dir": "/elsewhere", "base_url": "/"},
        {"pid": 77, "root_dir": str(tmp_path), "base_url": "/user/me/"},
    ]
    monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda: iter(servers))
    path = tmp_path / "my clips" / "a#b.mp4"
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert server_link(path) is None  # no notebook
    monkeypatch.setenv("JPY_PARENT_PID", "77")
    assert server_link(path) == "/user/me/files/my%20clips/a%23b.mp4"
    assert server_link(tmp_path.parent / "a.mp4") is None  # which the server does not serve
