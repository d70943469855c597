//! What one instruction does to what is known, and what it must not do.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use translator::{Kind, Request};

use super::fields::{Field, field, switch};
use super::state::{Compared, GUEST_CELLS, InPage, State};
use super::value::{Entry, Meaning, Symbols, Tag, Value};

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;
const TLB_INDEX_BITS: u64 = translator::context::TLB_ENTRIES as u64 - 1;
/// Largest operand of a bounce block: what the bounce page keeps free on both sides.
const BOUNCE_BYTES_MAX: u64 = 64;

pub(crate) type Checked<T> = Result<T, &'static str>;

/// What is needed beside the state.
pub(crate) struct Stepper<'a> {
    pub(crate) request: &'a Request,
    pub(crate) symbols: Symbols,
    pub(crate) info: InstructionInfoFactory,
    /// Position of the instruction at hand.
    pub(crate) at: u32,
}

/// A memory operand's place.
enum Place {
    /// A field of the context, and the index in it.
    Field(Field, Index),
    /// A host address.
    Host(Value),
}

enum Index {
    Known(usize),
    Value(Value),
}

/// The 64-bit register's number that `register` is part of.
fn general(register: Register) -> Option<usize> {
    let full = register.full_register();
    (full.is_gpr64()).then(|| full.number())
}

fn is_64(register: Register) -> bool {
    register.is_gpr64()
}

impl Stepper<'_> {
    fn symbol(&mut self, meaning: Meaning) -> Value {
        Value::symbol(self.symbols.get(meaning))
    }

    /// Something that the guest may know.
    fn result(&mut self, slot: usize) -> Value {
        self.symbol(Meaning::Result(self.at, slot as u32))
    }

    fn secret(&mut self, slot: usize) -> Value {
        self.symbol(Meaning::Secret(self.at, slot as u32))
    }

    /// An instruction that is no jump.
    pub(crate) fn instruction(&mut self, state: &mut State, ins: &Instruction) -> Checked<()> {
        if ins.flow_control() != FlowControl::Next {
            return Err("a jump where none is expected");
        }
        if ins.is_string_instruction() {
            return self.string(state, ins);
        }
        match ins.code() {
            // Looks at its operand's form only (SDM vol. 2B, NOP).
            Code::Nop_rm16 | Code::Nop_rm32 => {}
            Code::Cld => state.upwards = true,
            Code::Std => state.upwards = false,
            Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 | Code::Mov_r32_imm32
                if ins.op0_kind() == OpKind::Register =>
            {
                let to = general(ins.op0_register()).ok_or("no register")?;
                state.registers[to] = Value::constant(ins.immediate(1));
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64
                if ins.op1_kind() == OpKind::Register && ins.op0_kind() == OpKind::Register =>
            {
                let to = general(ins.op0_register()).ok_or("no register")?;
                let from = general(ins.op1_register()).ok_or("no register")?;
                state.registers[to] = state.registers[from].clone();
            }
            Code::Mov_r64_rm64 if ins.segment_prefix() == Register::GS => {
                let to = general(ins.op0_register()).ok_or("no register")?;
                state.registers[to] = self.load(state, ins)?;
            }
            Code::Mov_rm64_r64 if ins.segment_prefix() == Register::GS => {
                let from = general(ins.op1_register()).ok_or("no register")?;
                let value = state.registers[from].clone();
                self.store(state, ins, value)?;
            }
            Code::Mov_rm64_imm32 if ins.segment_prefix() == Register::GS => {
                self.store(state, ins, Value::constant(ins.immediate(1)))?;
            }
            Code::Lea_r64_m => {
                let to = general(ins.op0_register()).ok_or("no register")?;
                state.registers[to] = self.address(state, ins)?;
            }
            Code::Not_rm64 if ins.op0_kind() == OpKind::Register => {
                let r = general(ins.op0_register()).ok_or("no register")?;
                state.registers[r] = Value::constant(u64::MAX).minus(&state.registers[r]);
            }
            Code::Add_rm64_imm8
            | Code::Add_rm64_imm32
            | Code::Sub_rm64_imm8
            | Code::Sub_rm64_imm32
                if ins.op0_kind() == OpKind::Register =>
            {
                let r = general(ins.op0_register()).ok_or("no register")?;
                self.wants_clean(state, r)?;
                let by = ins.immediate(1);
                let by = if ins.mnemonic() == Mnemonic::Add {
                    by
                } else {
                    by.wrapping_neg()
                };
                state.registers[r].constant = state.registers[r].constant.wrapping_add(by);
            }
            Code::Xor_r64_rm64 if ins.segment_prefix() == Register::GS => {
                let r = general(ins.op0_register()).ok_or("no register")?;
                let tag = self.load(state, ins)?;
                state.registers[r] = match tag.as_symbol() {
                    Some(tag) if matches!(self.symbols.meaning(tag), Meaning::Tag(..)) => {
                        let value = state.registers[r].clone();
                        self.symbol(Meaning::Xor(value, tag))
                    }
                    _ if self.symbols.clean(&state.registers[r]) && self.symbols.clean(&tag) => {
                        self.result(r)
                    }
                    _ => self.secret(r),
                };
            }
            Code::Add_r64_rm64 if ins.segment_prefix() == Register::GS => {
                let r = general(ins.op0_register()).ok_or("no register")?;
                let value = self.load(state, ins)?;
                state.registers[r] = state.registers[r].add(&value, 1);
            }
            Code::VEX_Pext_r64_r64_rm64 if ins.segment_prefix() == Register::GS => {
                return self.extract(state, ins);
            }
            Code::VEX_Shlx_r64_rm64_r64
            | Code::VEX_Shrx_r64_rm64_r64
            | Code::VEX_Sarx_r64_rm64_r64
                if ins.op1_kind() == OpKind::Register =>
            {
                return self.shift(state, ins);
            }
            Code::Cmp_rm64_imm32 | Code::Cmp_rm64_imm8 if ins.op0_kind() == OpKind::Register => {
                let r = general(ins.op0_register()).ok_or("no register")?;
                state.compared =
                    Compared::Constant(state.registers[r].clone(), ins.immediate(1) as i64);
                return Ok(());
            }
            Code::Cmp_rm64_imm32 | Code::Cmp_rm64_imm8 if ins.segment_prefix() == Register::GS => {
                let constant = ins.immediate(1);
                state.compared =
                    if let Place::Field(Field::Direction, _) = self.place(state, ins)? {
                        if constant != 0 {
                            return Err("a comparison of the direction with no zero");
                        }
                        Compared::Direction
                    } else {
                        Compared::Values(Value::constant(constant), self.load(state, ins)?)
                    };
                return Ok(());
            }
            Code::Cmp_r64_rm64 if ins.segment_prefix() == Register::GS => {
                let r = general(ins.op0_register()).ok_or("no register")?;
                let value = self.load(state, ins)?;
                state.compared = Compared::Values(state.registers[r].clone(), value);
                return Ok(());
            }
            _ => return self.other(state, ins),
        }
        if ins.rflags_modified() != 0 {
            state.compared = Compared::Other;
        }
        Ok(())
    }

    /// An instruction of which only matters what it reads and what it writes.
    fn other(&mut self, state: &mut State, ins: &Instruction) -> Checked<()> {
        let memory = (0..ins.op_count()).find(|k| ins.op_kind(*k) == OpKind::Memory);
        let mut written = [false; 16];
        let mut address = [Register::None; 2];
        if let Some(operand) = memory {
            let access = self.info.info(ins).op_access(operand);
            address = [ins.memory_base(), ins.memory_index()];
            if access != OpAccess::NoMemAccess {
                self.operand(state, ins, access)?;
            }
        }
        // Registers that are read other than for the address must be the guest's
        // business.
        let used: Vec<_> = self.info.info(ins).used_registers().to_vec();
        for used in used {
            let Some(r) = general(used.register()) else {
                continue;
            };
            let reads = !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite);
            let read_as_operand = (0..ins.op_count()).any(|k| {
                ins.op_kind(k) == OpKind::Register
                    && general(ins.op_register(k)) == Some(r)
                    && self.info.info(ins).op_access(k) != OpAccess::Write
            });
            let for_address = address.iter().any(|a| general(*a) == Some(r));
            if reads && (read_as_operand || !for_address) {
                self.wants_clean(state, r)?;
            }
            if for_address && memory.is_some() && ins.mnemonic() == Mnemonic::Lea {
                self.wants_clean(state, r)?;
            }
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                // What is not overwritten stays, and so does a conditional write's.
                let whole = used.access() == OpAccess::Write
                    && (is_64(used.register()) || used.register().is_gpr32());
                if !whole {
                    self.wants_clean(state, r)?;
                }
                written[r] = true;
            }
        }
        for (r, written) in written.into_iter().enumerate() {
            if written {
                state.registers[r] = self.result(r);
            }
        }
        if ins.rflags_modified() != 0 {
            state.compared = Compared::Other;
        }
        Ok(())
    }

    fn wants_clean(&self, state: &State, register: usize) -> Checked<()> {
        if self.symbols.clean(&state.registers[register]) {
            Ok(())
        } else {
            Err("a host address in a register that the guest's instruction uses")
        }
    }

    /// Checks a memory operand of any size.
    fn operand(&mut self, state: &mut State, ins: &Instruction, access: OpAccess) -> Checked<()> {
        let write = !matches!(access, OpAccess::Read | OpAccess::CondRead);
        let size = ins.memory_size().size() as u64;
        if size == 0 {
            return Err("an operand without a size");
        }
        if let (Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts, OpKind::Register) =
            (ins.mnemonic(), ins.op1_kind())
        {
            let index = general(ins.op1_register()).ok_or("no register")?;
            let most = state.most(&self.symbols, &state.registers[index]);
            if most.is_none_or(|most| most >= size * 8) {
                return Err("a bit index beyond the operand");
            }
        }
        match self.place(state, ins)? {
            Place::Host(address) => self.host(state, &address, size, write),
            Place::Field(Field::Cell(cell), _) if cell < GUEST_CELLS && size <= 8 => {
                if write {
                    state.cells[cell] = self.result(16 + cell);
                }
                Ok(())
            }
            Place::Field(..) => Err("a field of the context that is not the guest's"),
        }
    }

    /// Checks an access to a host address.
    fn host(&self, state: &State, address: &Value, size: u64, write: bool) -> Checked<()> {
        if let Some(symbol) = address.as_symbol()
            && *self.symbols.meaning(symbol) == Meaning::Bounce
        {
            return if self.request.kind == Kind::Bounce && size <= BOUNCE_BYTES_MAX {
                Ok(())
            } else {
                Err("the bounce page outside of a bounce block")
            };
        }
        if state.reaches(&self.symbols, address, size, write) {
            Ok(())
        } else {
            Err("an operand that no check covers")
        }
    }

    /// The address of a memory operand as a value.
    fn address(&mut self, state: &State, ins: &Instruction) -> Checked<Value> {
        if ins.is_ip_rel_memory_operand() {
            let target = ins.ip_rel_memory_address().wrapping_sub(self.request.place);
            return Ok(self.symbol(Meaning::Code).offset(target));
        }
        let mut address = Value::constant(ins.memory_displacement64());
        for (register, scale) in [
            (ins.memory_base(), 1),
            (ins.memory_index(), u64::from(ins.memory_index_scale())),
        ] {
            if register == Register::None {
                continue;
            }
            if !is_64(register) {
                return Err("an address of 32 bits");
            }
            address = address.add(&state.registers[register.number()], scale);
        }
        Ok(address)
    }

    fn place(&mut self, state: &State, ins: &Instruction) -> Checked<Place> {
        if ins.is_ip_rel_memory_operand() {
            return Err("an operand in the code");
        }
        let address = self.address(state, ins)?;
        if ins.segment_prefix() != Register::GS {
            return Ok(Place::Host(address));
        }
        if ins.memory_base() == Register::None && ins.memory_index() == Register::None {
            let (field, index) = field(address.constant, self.request.mode)
                .or_else(|| switch(address.constant, self.request.mode))
                .ok_or("a field of the context that is out of reach")?;
            return Ok(Place::Field(field, Index::Known(index)));
        }
        // gs:[index * 8 + table]
        let (field, first) = field(ins.memory_displacement64(), self.request.mode)
            .ok_or("a table of the context that is out of reach")?;
        if ins.memory_base() != Register::None || ins.memory_index_scale() != 8 || first != 0 {
            return Err("no entry of a table");
        }
        let index = state.registers[ins.memory_index().number()].clone();
        let entries = match field {
            Field::Tags(_) | Field::Hosts | Field::Addends => TLB_INDEX_BITS,
            Field::Jumps => self.request.mode.jump_entries() as u64 - 1,
            _ => return Err("an index into a field that is no table"),
        };
        if state
            .most(&self.symbols, &index)
            .is_none_or(|most| most > entries)
        {
            return Err("an index that may be beyond its table");
        }
        Ok(Place::Field(field, Index::Value(index)))
    }

    /// The entry that an index selects.
    fn entry(&mut self, index: Index) -> Checked<Entry> {
        match index {
            Index::Known(index) => Ok(Entry::Constant(index as u64)),
            Index::Value(value) => {
                let symbol = value.as_symbol().ok_or("an index that is computed")?;
                match self.symbols.meaning(symbol) {
                    Meaning::TlbIndex(address) => Ok(Entry::Of(address.clone())),
                    _ => Err("an index of something else"),
                }
            }
        }
    }

    /// Eight bytes from the context.
    fn load(&mut self, state: &State, ins: &Instruction) -> Checked<Value> {
        let Place::Field(field, index) = self.place(state, ins)? else {
            return Err("no field of the context");
        };
        let meaning = match field {
            Field::Cell(cell) => return Ok(state.cells[cell].clone()),
            Field::Plain | Field::Guest | Field::Bit | Field::AlignmentCheck | Field::Direction => {
                return Ok(self.result(32));
            }
            Field::Bounce => Meaning::Bounce,
            Field::StackTag => Meaning::Tag(Tag::Write, Entry::Stack, state.slot),
            Field::StackAddend => Meaning::Addend(Entry::Stack, state.slot),
            Field::Tags(kind) => Meaning::Tag(kind, self.entry(index)?, state.tlb),
            Field::Hosts => Meaning::Host(self.entry(index)?, state.tlb),
            Field::Addends => Meaning::Addend(self.entry(index)?, state.tlb),
            Field::TlbMask | Field::PageMask | Field::JumpMask => {
                return Err("a mask where none is expected");
            }
            Field::Jumps => return Err("a jump cache entry as a value"),
        };
        Ok(self.symbol(meaning))
    }

    /// Eight bytes to the context.
    fn store(&mut self, state: &mut State, ins: &Instruction, value: Value) -> Checked<()> {
        let Place::Field(field, _) = self.place(state, ins)? else {
            return Err("no field of the context");
        };
        match field {
            Field::Cell(cell) if cell >= GUEST_CELLS || self.symbols.clean(&value) => {
                state.cells[cell] = value;
                Ok(())
            }
            Field::Guest if self.symbols.clean(&value) => Ok(()),
            Field::Bit | Field::Direction if matches!(value.as_constant(), Some(0 | 1)) => Ok(()),
            Field::AlignmentCheck if matches!(value.as_constant(), Some(0 | 0x4_0000)) => Ok(()),
            _ => Err("a store to a field of the context that is not for it"),
        }
    }

    /// `pext r, r, gs:[mask]`
    fn extract(&mut self, state: &mut State, ins: &Instruction) -> Checked<()> {
        let to = general(ins.op0_register()).ok_or("no register")?;
        let from = general(ins.op1_register()).ok_or("no register")?;
        let value = state.registers[from].clone();
        let Place::Field(mask, _) = self.place(state, ins)? else {
            return Err("no mask");
        };
        state.registers[to] = match mask {
            Field::TlbMask => self.symbol(Meaning::TlbIndex(value)),
            Field::JumpMask => {
                let most = self.request.mode.jump_entries() as u64 - 1;
                self.symbol(Meaning::JumpIndex(value, most))
            }
            Field::PageMask => self.symbol(Meaning::PageOf(value)),
            _ => return Err("no mask"),
        };
        Ok(())
    }

    /// A shift by RCX: to the right by a constant, it bounds the result.
    fn shift(&mut self, state: &mut State, ins: &Instruction) -> Checked<()> {
        let to = general(ins.op0_register()).ok_or("no register")?;
        let from = general(ins.op1_register()).ok_or("no register")?;
        let by = general(ins.op2_register()).ok_or("no register")?;
        self.wants_clean(state, from)?;
        self.wants_clean(state, by)?;
        state.registers[to] = match (ins.mnemonic(), state.registers[by].as_constant()) {
            (Mnemonic::Shrx, Some(count @ 1..=63)) => {
                self.symbol(Meaning::Bounded(self.at, to as u32, u64::MAX >> count))
            }
            _ => self.result(to),
        };
        Ok(())
    }

    /// MOVS, STOS and LODS, with REP or not.
    fn string(&mut self, state: &mut State, ins: &Instruction) -> Checked<()> {
        let size = ins.memory_size().size() as u64;
        if ins.has_repne_prefix() {
            return Err("REPNE");
        }
        let repeated = ins.has_rep_prefix();
        if repeated && !state.upwards {
            return Err("REP that may go downwards");
        }
        let mut pointers = Vec::new();
        for operand in 0..ins.op_count() {
            match ins.op_kind(operand) {
                OpKind::MemoryESRDI => pointers.push((RDI, true)),
                OpKind::MemorySegRSI => pointers.push((RSI, false)),
                _ => {}
            }
        }
        for (pointer, write) in &pointers {
            let address = &state.registers[*pointer];
            let reached = if repeated {
                self.run_reaches(state, address, size, *write)
            } else {
                state.reaches(&self.symbols, address, size, *write)
            };
            if !reached {
                return Err("a string that no check covers");
            }
        }
        if ins.mnemonic() == Mnemonic::Movsd && ins.op_count() != 2 {
            return Err("no string instruction");
        }
        if matches!(
            ins.mnemonic(),
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq
        ) {
            self.wants_clean(state, 0)?;
        }
        if matches!(
            ins.mnemonic(),
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq
        ) {
            if repeated {
                return Err("REP LODS");
            }
            self.wants_clean(state, 0)?;
            state.registers[0] = self.result(0);
        }
        let by = if repeated {
            let count = std::mem::replace(&mut state.registers[RCX], Value::constant(0));
            Value::constant(0).add(&count, size)
        } else {
            self.result(33)
        };
        for (pointer, _) in pointers {
            state.registers[pointer] = state.registers[pointer].add(&by, 1);
        }
        Ok(())
    }

    /// Whether RCX elements from `address` upwards are in a page that was checked.
    fn run_reaches(&self, state: &State, address: &Value, size: u64, write: bool) -> bool {
        let count = &state.registers[RCX];
        let short = state
            .most(&self.symbols, count)
            .is_some_and(|most| most <= 4096);
        if !short || !state.reaches(&self.symbols, address, 1, write) {
            return false;
        }
        // offset in the page + count * size <= 4096, neither of which can wrap
        state.at_most.iter().any(|(sum, most)| {
            let offset = sum.add(count, size.wrapping_neg());
            let Some(Meaning::Xor(linear, tag)) =
                offset.as_symbol().map(|s| self.symbols.meaning(s))
            else {
                return false;
            };
            let addend = address.minus(linear);
            *most <= 4096
                && state
                    .most(&self.symbols, &offset)
                    .is_some_and(|most| most < 4096)
                && match (
                    addend.as_symbol().map(|s| self.symbols.meaning(s)),
                    self.symbols.meaning(*tag),
                ) {
                    (Some(Meaning::Addend(a, when)), Meaning::Tag(kind, b, then)) => {
                        a == b && when == then && (!write || *kind == Tag::Write)
                    }
                    _ => false,
                }
        })
    }

    /// What holds where a conditional jump is not taken.
    pub(crate) fn not_taken(&self, state: &mut State, ins: &Instruction) {
        match (ins.mnemonic(), state.compared.clone()) {
            (Mnemonic::Ja, Compared::Constant(value, most @ 0..)) => {
                if let Some(Meaning::Xor(address, tag)) =
                    value.as_symbol().map(|s| self.symbols.meaning(s))
                    && most <= 4095
                {
                    let fact = InPage {
                        tag: *tag,
                        address: address.clone(),
                        low: 0,
                        high: most,
                    };
                    state.learn(&self.symbols, fact);
                }
                state.at_most.push((value, most as u64));
            }
            (Mnemonic::Jne, Compared::Values(page, tag)) => self.equal(state, &page, &tag),
            (Mnemonic::Jne, Compared::Direction) => state.upwards = true,
            _ => {}
        }
    }

    /// What holds where JRCXZ is taken.
    pub(crate) fn zero(&self, state: &mut State) {
        let value = state.registers[RCX].clone();
        if let Some(Meaning::PageOf(sum)) = value.as_symbol().map(|s| self.symbols.meaning(s)) {
            let tag = sum.terms.iter().find(|(symbol, factor)| {
                *factor == u64::MAX && matches!(self.symbols.meaning(*symbol), Meaning::Tag(..))
            });
            if let Some((tag, _)) = tag {
                // sum = address - tag + c, c the offset of the last byte
                let sum = sum.add(&Value::symbol(*tag), 1);
                let address = match self.symbols.meaning(*tag) {
                    Meaning::Tag(_, Entry::Of(address), _) => address.clone(),
                    _ => state
                        .in_page
                        .iter()
                        .find(|fact| fact.tag == *tag)
                        .map_or_else(|| sum.clone(), |fact| fact.address.clone()),
                };
                if let Some(c) = sum.minus(&address).as_constant()
                    && c <= 4095
                {
                    let fact = InPage {
                        tag: *tag,
                        address,
                        low: -(c as i64),
                        high: 4095 - c as i64,
                    };
                    state.learn(&self.symbols, fact);
                }
            }
        } else if let [(symbol, 1)] = value.terms.as_slice() {
            // tag - page = 0
            let page = Value::constant(value.constant.wrapping_neg());
            self.equal(state, &page, &Value::symbol(*symbol));
        }
        state.registers[RCX] = Value::constant(0);
    }

    fn equal(&self, state: &mut State, page: &Value, tag: &Value) {
        if let Some(symbol) = tag.as_symbol()
            && matches!(self.symbols.meaning(symbol), Meaning::Tag(..))
            && page.as_constant().is_some_and(|page| page & 0xfff == 0)
        {
            let fact = InPage {
                tag: symbol,
                address: page.clone(),
                low: 0,
                high: 0,
            };
            state.learn(&self.symbols, fact);
        }
    }

    /// The table entry that a jump through the context takes: it must be the mode's
    /// jump cache.
    pub(crate) fn jump_cache(&mut self, state: &State, ins: &Instruction) -> Checked<()> {
        if ins.segment_prefix() != Register::GS {
            return Err("a computed jump to where the guest says");
        }
        match self.place(state, ins)? {
            Place::Field(Field::Jumps, _) => {}
            _ => return Err("a jump through no jump cache"),
        }
        if !self.symbols.clean(&state.registers[14]) {
            return Err("a jump to an address that the guest may not know");
        }
        Ok(())
    }
}
