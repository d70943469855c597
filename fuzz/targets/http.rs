//! A connection to the API: requests one after another, their routes and their bodies.
//! The first byte says in how large pieces the rest arrives.
#![no_main]

use api::fuzz::{Seen, connection, refusal};
use libfuzzer_sys::fuzz_target;

/// The request as a good client would have sent it.
fn printed(request: &Seen) -> Vec<u8> {
    let body = request.body.as_deref().unwrap_or_default();
    let (len, end) = (
        body.len(),
        if request.keep_alive {
            ""
        } else {
            "Connection: close\r\n"
        },
    );
    let head = format!(
        "{} {} HTTP/1.1\r\n{end}Content-Length: {len}\r\n\r\n",
        request.method, request.path
    );
    [head.as_bytes(), body].concat()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, bytes)) = bytes.split_first() else {
        return;
    };
    let requests = connection(bytes, usize::MAX);
    // How the bytes arrive changes nothing.
    assert_eq!(requests, connection(bytes, usize::from(piece).max(1)));
    for request in requests {
        let again = connection(&printed(&request), usize::MAX);
        assert_eq!(again, std::slice::from_ref(&request));
        if let Err(line) = &request.call {
            assert!(!line.contains('\n'), "{line:?}");
            let answer = refusal(line);
            let body = answer.split(|&byte| byte == b'\n').next_back().unwrap();
            let fault: serde_json::Value = serde_json::from_slice(body).unwrap();
            assert_eq!(fault["fault_message"], line.as_str());
        }
    }
});
