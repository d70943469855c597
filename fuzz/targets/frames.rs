//! What a guest says to its host and the host to its guest, whole and in pieces. The first
//! byte says how large the pieces are.
#![no_main]

use std::fmt::Debug;

use guest_wire::{
    FrameDecoder, GuestMessage, HostMessage, Message, WireError, encode, read_hello, read_message,
};
use libfuzzer_sys::fuzz_target;

/// All messages up to the end or to the first one that is not understood.
fn whole<M: Message>(mut stream: &[u8]) -> (Vec<M>, Result<(), WireError>) {
    let mut messages = Vec::new();
    loop {
        match read_message(&mut stream) {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return (messages, Ok(())),
            Err(error) => return (messages, Err(error)),
        }
    }
}

/// As [`whole`], of bytes that come in pieces.
fn in_pieces<M: Message>(bytes: &[u8], piece: usize) -> (Vec<M>, Result<(), WireError>) {
    let mut decoder = FrameDecoder::new();
    let mut messages = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.feed(piece);
        loop {
            match decoder.take_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Err(error)),
            }
        }
    }
    (messages, decoder.finish())
}

fn check<M: Message + Debug + PartialEq>(bytes: &[u8], piece: usize) {
    let (messages, end) = whole::<M>(bytes);
    let (others, other_end) = in_pieces::<M>(bytes, piece);
    assert_eq!(messages, others);
    assert_eq!(end.is_ok(), other_end.is_ok(), "{end:?}, {other_end:?}");

    // Said again by us they are the same.
    let mut again = Vec::new();
    for message in &messages {
        encode(message, &mut again).expect("what came in a frame fits one");
    }
    let (again, end) = whole::<M>(&again);
    assert!(end.is_ok());
    assert_eq!(again, messages);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, mut bytes)) = bytes.split_first() else {
        return;
    };
    let piece = usize::from(piece).max(1);
    check::<GuestMessage>(bytes, piece);
    check::<HostMessage>(bytes, piece);
    let mut decoder = FrameDecoder::new();
    decoder.feed(bytes);
    let fed = decoder.take_hello().ok().flatten();
    let read = read_hello(&mut bytes).ok();
    assert_eq!(fed, read);
    if let Some(hello) = read {
        // An answer, or both versions and the way out.
        let _ = hello.agree();
    }
});
