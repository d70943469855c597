//! What clients ask of the balloon while the machine runs.

use std::sync::{Arc, Mutex, PoisonError};

use api::{Action, Answer, Refusal};
use serde_json::json;
use virtio::balloon::Balloon;

use crate::frontend::refuse;

pub(super) fn act(balloon: Option<&Arc<Mutex<Balloon>>>, asked: Action) -> Result<Answer, Refusal> {
    let Some(balloon) = balloon else {
        return Err(refuse(
            "there is no balloon: configure one before the machine starts",
        ));
    };
    let mut balloon = balloon.lock().unwrap_or_else(PoisonError::into_inner);
    let done = match asked {
        Action::GetBalloon => return Ok(Answer::Body(configuration(&balloon))),
        Action::GetBalloonStatistics => {
            let said = balloon
                .statistics()
                .map_err(|error| refuse(&error.to_string()))?;
            let mut value = json!({
                "target_pages": balloon.target_pages(),
                "actual_pages": balloon.actual_pages(),
                "target_mib": balloon.target_pages() >> 8,
                "actual_mib": balloon.actual_pages() >> 8,
            });
            if let (Some(all), serde_json::Value::Object(said)) =
                (value.as_object_mut(), json!(said))
            {
                // What the guest has not said is left out.
                all.extend(said.into_iter().filter(|(_, value)| !value.is_null()));
            }
            return Ok(Answer::Body(value));
        }
        Action::GetHinting => {
            let hinting = balloon
                .hinting()
                .map_err(|error| refuse(&error.to_string()))?;
            return Ok(Answer::Body(json!({
                "host_cmd": hinting.host_command,
                "guest_cmd": hinting.guest_command,
            })));
        }
        Action::PatchBalloon(asked) => balloon.update(asked.amount_mib),
        Action::PatchBalloonStatistics(asked) => {
            balloon.update_statistics_interval(asked.stats_polling_interval_s)
        }
        Action::StartHinting(asked) => balloon.start_hinting(asked.acknowledge_on_stop),
        Action::StopHinting => balloon.stop_hinting(),
        _ => return Err(refuse("this is not the balloon's")),
    };
    done.map(|()| Answer::Done)
        .map_err(|error| refuse(&error.to_string()))
}

fn configuration(balloon: &Balloon) -> serde_json::Value {
    let settings = balloon.settings();
    json!({
        "amount_mib": settings.amount_mib,
        "deflate_on_oom": settings.deflate_on_oom,
        "stats_polling_interval_s": settings.statistics_interval_s,
        "free_page_hinting": settings.hinting,
        "free_page_reporting": settings.reporting,
    })
}
