//! What `kombi inspect` says of a container: docker's names where the meaning is the same.

use containers::{Container, Phase};
use serde_json::{Value, json};

/// What docker says of a time that has not come.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// The container as JSON.
pub(crate) fn value(container: &Container) -> Value {
    let (record, state) = (container.record(), container.state());
    let process = &record.task["process"];
    let plan = &record.task["plan"];
    let hostname = plan["hostname"].as_str().unwrap_or(record.id.short());
    let mebibytes = plan["memory_mib"].as_u64().unwrap_or_default();
    let cpus = plan["vcpus"].as_u64().unwrap_or_default();
    let log = json!({
        "max-size": record.log.max_size.map(|bytes| bytes.to_string()),
        "max-file": record.log.max_file.to_string(),
    });
    json!({
        "Id": record.id,
        "Created": record.created,
        "Path": record.command.first(),
        "Args": record.command.get(1..).unwrap_or_default(),
        "State": {
            "Status": state.phase.as_str(),
            "Running": state.phase == Phase::Running,
            "Paused": false,
            "Restarting": false,
            "OOMKilled": false,
            "Dead": false,
            "Pid": state.pid.unwrap_or(0),
            "ExitCode": state.exit_code.unwrap_or(0),
            "Error": state.error.as_deref().unwrap_or_default(),
            "StartedAt": state.started.as_deref().unwrap_or(NEVER),
            "FinishedAt": state.finished.as_deref().unwrap_or(NEVER),
        },
        "Image": record.image_digest,
        "Name": format!("/{}", record.name),
        "LogPath": container.dir().join("log.json"),
        "HostConfig": {
            "AutoRemove": record.remove_at_end,
            "Memory": mebibytes << 20,
            "NanoCpus": cpus * 1_000_000_000,
            "LogConfig": { "Type": "json-file", "Config": log },
        },
        "Config": {
            "Hostname": hostname,
            "User": process["user"],
            "Tty": !process["terminal"].is_null(),
            "OpenStdin": process["stdin"],
            "Env": process["env"],
            "Cmd": record.command,
            "Image": record.image,
            "WorkingDir": process["cwd"],
            "Labels": record.labels,
            "StopSignal": record.stop_signal.to_string(),
            "StopTimeout": record.stop_timeout_seconds,
        },
    })
}
