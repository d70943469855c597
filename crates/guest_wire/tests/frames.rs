//! The two ends understand each other, and bytes from nowhere do no harm.

use std::io::Cursor;

use guest_wire::{
    FRAME_BYTES_MAX, FrameDecoder, GuestMessage, Hello, HostMessage, MachineSpec, ProcessSpec,
    STDIO_CHUNK_BYTES_MAX, StartFailure, StartSpec, TerminalSize, VERSION, Version, WireError,
    encode, layer_device_name, read_hello, read_message, write_hello, write_message,
};
use proptest::{collection::vec, option, prelude::*};

fn terminal_size() -> impl Strategy<Value = TerminalSize> {
    any::<(u16, u16)>().prop_map(|(rows, cols)| TerminalSize { rows, cols })
}

fn start_spec() -> impl Strategy<Value = StartSpec> {
    let machine = (".{0,70}", any::<u16>(), any::<bool>()).prop_map(|(hostname, layers, keeps)| {
        MachineSpec {
            hostname,
            layers,
            keeps,
        }
    });
    let process = (
        vec(".{0,30}", 0..5),
        vec(".{0,30}", 0..5),
        ".{0,30}",
        ".{0,30}",
        option::of(terminal_size()),
        any::<bool>(),
    )
        .prop_map(|(args, env, cwd, user, terminal, stdin)| ProcessSpec {
            args,
            env,
            cwd,
            user,
            terminal,
            stdin,
        });
    (machine, process).prop_map(|(machine, process)| StartSpec { machine, process })
}

fn host_message() -> impl Strategy<Value = HostMessage> {
    prop_oneof![
        start_spec().prop_map(|spec| HostMessage::Start(Box::new(spec))),
        vec(any::<u8>(), 0..2000).prop_map(|bytes| HostMessage::Stdin { bytes }),
        Just(HostMessage::StdinEof),
        terminal_size().prop_map(HostMessage::Resize),
        any::<u8>().prop_map(|number| HostMessage::Signal { number }),
        Just(HostMessage::Shutdown),
    ]
}

fn start_failure() -> impl Strategy<Value = StartFailure> {
    prop_oneof![
        Just(StartFailure::NotFound),
        Just(StartFailure::NotExecutable),
        Just(StartFailure::BadUser),
        Just(StartFailure::BadCwd),
        Just(StartFailure::Other),
    ]
}

fn guest_message() -> impl Strategy<Value = GuestMessage> {
    prop_oneof![
        any::<u32>().prop_map(|pid| GuestMessage::Started { pid }),
        (start_failure(), ".{0,80}")
            .prop_map(|(kind, message)| GuestMessage::StartFailed { kind, message }),
        vec(any::<u8>(), 0..2000).prop_map(|bytes| GuestMessage::Stdout { bytes }),
        vec(any::<u8>(), 0..2000).prop_map(|bytes| GuestMessage::Stderr { bytes }),
        any::<u32>().prop_map(|bytes| GuestMessage::StdinCredit { bytes }),
        any::<u8>().prop_map(|code| GuestMessage::Exited { code }),
        any::<(u8, bool)>().prop_map(|(number, core)| GuestMessage::Signalled { number, core }),
        ".{0,80}".prop_map(|message| GuestMessage::InitFailed { message }),
    ]
}

/// Everything that a decoder gives for `bytes` fed in pieces of `step`, up to its first error.
fn take_all(bytes: &[u8], step: usize) -> (Vec<HostMessage>, Option<String>) {
    let mut decoder = FrameDecoder::new();
    let mut taken = Vec::new();
    for piece in bytes.chunks(step) {
        decoder.feed(piece);
        loop {
            match decoder.take_message() {
                Ok(Some(message)) => taken.push(message),
                Ok(None) => break,
                Err(error) => return (taken, Some(error.to_string())),
            }
        }
        assert!(
            decoder.pending() < FRAME_BYTES_MAX + 4 + step,
            "held {} bytes",
            decoder.pending()
        );
    }
    (taken, decoder.finish().err().map(|error| error.to_string()))
}

fn is_of_the_body(error: &WireError) -> bool {
    matches!(
        error,
        WireError::Malformed { .. } | WireError::Surplus { .. }
    )
}

proptest! {
    #[test]
    fn host_messages_survive_any_cutting_of_the_stream(messages in vec(host_message(), 0..6), step in 1_usize..300) {
        let mut stream = Vec::new();
        for message in &messages {
            encode(message, &mut stream)?;
        }
        prop_assert_eq!(take_all(&stream, step), (messages, None));
    }

    #[test]
    fn guest_messages_survive_a_blocking_stream(messages in vec(guest_message(), 0..6)) {
        let mut stream = Vec::new();
        for message in &messages {
            write_message(&mut stream, message)?;
        }
        let mut reader = Cursor::new(stream);
        for message in messages {
            prop_assert_eq!(read_message(&mut reader)?, Some(message));
        }
        prop_assert_eq!(read_message::<GuestMessage>(&mut reader)?, None);
    }

    #[test]
    fn arbitrary_bytes_end_in_an_error_or_a_message(bytes in vec(any::<u8>(), 0..4000), step in 1_usize..500) {
        let (by_pieces, _error) = take_all(&bytes, step);
        let mut reader = Cursor::new(&bytes);
        let mut at_once = Vec::new();
        while let Ok(Some(message)) = read_message(&mut reader) {
            at_once.push(message);
        }
        prop_assert_eq!(by_pieces, at_once);
    }

    #[test]
    fn arbitrary_bodies_of_right_length_end_in_an_error_or_a_message(body in vec(any::<u8>(), 0..600)) {
        let mut frame = u32::try_from(body.len())?.to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        match read_message::<GuestMessage>(&mut Cursor::new(&frame)) {
            Ok(message) => prop_assert!(message.is_some()),
            Err(error) => prop_assert!(is_of_the_body(&error), "{error:?}"),
        }
        match read_message::<HostMessage>(&mut Cursor::new(&frame)) {
            Ok(message) => prop_assert!(message.is_some()),
            Err(error) => prop_assert!(is_of_the_body(&error), "{error:?}"),
        }
    }

    #[test]
    fn one_flipped_byte_never_panics(message in host_message(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut stream = Vec::new();
        encode(&message, &mut stream)?;
        let at = at.index(stream.len());
        stream[at] = with;
        let (taken, error) = take_all(&stream, 64);
        prop_assert!(taken.len() == 1 || error.is_some());
    }

    #[test]
    fn hello_is_read_from_every_version(major in any::<u16>(), minor in any::<u16>(), later in vec(any::<u8>(), 0..40)) {
        let hello = Hello { version: Version { major, minor } };
        let mut body = hello.to_body().to_vec();
        body.extend_from_slice(&later);
        prop_assert_eq!(Hello::from_body(&body)?, hello);
    }

    #[test]
    fn arbitrary_greetings_end_in_an_error(bytes in vec(any::<u8>(), 0..200)) {
        prop_assume!(bytes.get(4..12) != Some(b"KOMBIWIR"));
        let error = read_hello(&mut Cursor::new(&bytes)).unwrap_err();
        prop_assert!(matches!(error, WireError::NotHello | WireError::NoHello), "{error:?}");
    }
}

#[test]
fn hello_layout_is_fixed_for_ever() {
    let mut stream = Vec::new();
    write_hello(
        &mut stream,
        Hello {
            version: Version {
                major: 0x0102,
                minor: 0x0304,
            },
        },
    )
    .unwrap();
    assert_eq!(stream, b"\x10\0\0\0KOMBIWIR\x02\x01\x04\x03\0\0\0\0");
}

#[test]
fn other_major_is_refused_naming_both_versions_and_the_way_out() {
    let theirs = Version {
        major: VERSION.major + 1,
        minor: 7,
    };
    let error = Hello { version: theirs }.agree().unwrap_err().to_string();
    assert!(
        error.contains(&theirs.to_string()) && error.contains(&VERSION.to_string()),
        "{error}"
    );
    assert!(error.contains("same release"), "{error}");
}

#[test]
fn other_minor_agrees_on_the_lower_one() {
    let newer = Hello {
        version: Version {
            major: VERSION.major,
            minor: VERSION.minor + 1,
        },
    };
    assert_eq!(newer.agree().unwrap(), VERSION);
    assert_eq!(Hello::OURS.agree().unwrap(), VERSION);
}

#[test]
fn hello_then_messages_pass_through_one_decoder() {
    let mut stream = Vec::new();
    write_hello(&mut stream, Hello::OURS).unwrap();
    encode(&HostMessage::StdinEof, &mut stream).unwrap();
    let mut decoder = FrameDecoder::new();
    decoder.feed(&stream[..7]);
    assert_eq!(decoder.take_hello().unwrap(), None);
    decoder.feed(&stream[7..]);
    assert_eq!(decoder.take_hello().unwrap(), Some(Hello::OURS));
    assert_eq!(decoder.take_message().unwrap(), Some(HostMessage::StdinEof));
    assert_eq!(decoder.take_message::<HostMessage>().unwrap(), None);
    decoder.finish().unwrap();
}

#[test]
fn frame_longer_than_the_limit_is_refused_by_its_header_alone() {
    let header = u32::try_from(FRAME_BYTES_MAX + 1).unwrap().to_le_bytes();
    let mut decoder = FrameDecoder::new();
    decoder.feed(&header);
    let error = decoder.take_message::<HostMessage>().unwrap_err();
    assert!(
        matches!(error, WireError::FrameTooLong { length, .. } if length == FRAME_BYTES_MAX + 1)
    );
    let error = read_message::<HostMessage>(&mut Cursor::new(header)).unwrap_err();
    assert!(matches!(error, WireError::FrameTooLong { .. }));
}

#[test]
fn message_too_long_for_a_frame_is_not_sent() {
    let mut out = b"before".to_vec();
    let message = GuestMessage::InitFailed {
        message: "x".repeat(FRAME_BYTES_MAX),
    };
    assert!(matches!(
        encode(&message, &mut out),
        Err(WireError::FrameTooLong { .. })
    ));
    assert_eq!(out, b"before");
}

#[test]
fn lists_that_claim_more_than_they_hold_are_malformed() {
    // Start, hostname "", layers 1, args: a list of 2^63 strings, of which none follows.
    let body = [
        0, 0, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1,
    ];
    let mut frame = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    let error = read_message::<HostMessage>(&mut Cursor::new(frame)).unwrap_err();
    assert!(matches!(error, WireError::Malformed { .. }), "{error:?}");
}

#[test]
fn stream_that_ends_inside_a_frame_is_truncated() {
    let mut stream = Vec::new();
    encode(&HostMessage::Signal { number: 15 }, &mut stream).unwrap();
    for cut in 1..stream.len() {
        let error = read_message::<HostMessage>(&mut Cursor::new(&stream[..cut])).unwrap_err();
        assert!(
            matches!(error, WireError::Truncated),
            "cut at {cut}: {error:?}"
        );
        assert_eq!(
            take_all(&stream[..cut], 3).1.as_deref(),
            Some("control stream ended inside a frame")
        );
    }
}

#[test]
fn largest_stdio_chunk_fits_a_frame() {
    let message = GuestMessage::Stdout {
        bytes: vec![7; STDIO_CHUNK_BYTES_MAX],
    };
    let mut stream = Vec::new();
    encode(&message, &mut stream).unwrap();
    assert_eq!(
        read_message(&mut Cursor::new(stream)).unwrap(),
        Some(message)
    );
}

#[test]
fn start_failures_have_the_exit_codes_of_docker() {
    assert_eq!(StartFailure::NotFound.exit_code(), 127);
    assert_eq!(StartFailure::NotExecutable.exit_code(), 126);
    assert_eq!(StartFailure::BadUser.exit_code(), 125);
    assert_eq!(StartFailure::BadCwd.exit_code(), 125);
    assert_eq!(StartFailure::Other.exit_code(), 125);
}

#[test]
fn layer_devices_are_named_as_virtio_blk_names_them() {
    for (index, name) in [
        (0, "vda"),
        (25, "vdz"),
        (26, "vdaa"),
        (51, "vdaz"),
        (52, "vdba"),
        (701, "vdzz"),
    ] {
        assert_eq!(layer_device_name(index), name);
    }
    assert_eq!(layer_device_name(702), "vdaaa");
}
