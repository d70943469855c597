//! One machine of KVM's.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hv::{Error, Gpa, Interrupts, Partition};
use ram::PAGE_SIZE;

use crate::hypervisor::PINS;
use crate::ioctl::Vm;
use crate::vcpu::KvmVcpu;
use crate::{NAME, failed};

/// One machine on the KVM engine.
#[derive(Debug)]
pub struct KvmPartition {
    vm: Arc<Vm>,
    cpus: Vec<Option<KvmVcpu>>,
}

impl KvmPartition {
    pub(crate) fn new(vm: Arc<Vm>, cpus: Vec<Option<KvmVcpu>>) -> Self {
        Self { vm, cpus }
    }

    /// Starts or ends the log of pages that the guest writes. The log begins empty.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn log_writes(&self, yes: bool) -> Result<(), Error> {
        self.vm
            .log_writes(yes)
            .map_err(failed("log the guest's writes"))
    }

    /// Marks the pages of the log in memory's [`ram::PageEpochs`] as written now, and
    /// empties it.
    ///
    /// # Errors
    /// [`Error::Host`], also when there is no log.
    pub fn collect_writes(&self) -> Result<(), Error> {
        let ram = self.vm.ram();
        for slot in self.vm.slots() {
            let len = usize::try_from(slot.len).unwrap_or(usize::MAX);
            let words = self
                .vm
                .fd()
                .get_dirty_log(slot.number, len)
                .map_err(failed("read the log of the guest's writes"))?;
            for (word, first) in words.into_iter().zip((0_u64..).step_by(64)) {
                let mut left = word;
                while left != 0 {
                    let page = first + u64::from(left.trailing_zeros());
                    left &= left - 1;
                    let at = Gpa(slot.at.0 + page * PAGE_SIZE);
                    ram.epochs().mark(at, PAGE_SIZE);
                }
            }
        }
        Ok(())
    }
}

impl Partition for KvmPartition {
    type Vcpu = KvmVcpu;

    fn vcpu(&mut self, index: u8) -> Result<KvmVcpu, Error> {
        let slot = self.cpus.get_mut(usize::from(index));
        slot.and_then(Option::take)
            .ok_or(Error::NoSuchVcpu { index })
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::new(Lines(Arc::clone(&self.vm)))
    }

    fn doorbell(&self, at: Gpa, value: u32, bell: BorrowedFd<'_>) -> Result<bool, Error> {
        self.vm
            .ring_on_store(at.0, value, bell)
            .map_err(failed("have KVM ring a doorbell"))?;
        Ok(true)
    }
}

struct Lines(Arc<Vm>);

impl Interrupts for Lines {
    fn set_line(&self, gsi: u32, high: bool) {
        // As the software engine: there is nothing at lines beyond the IOAPIC.
        if gsi >= PINS {
            return;
        }
        if let Err(error) = self.0.fd().set_irq_line(gsi, high) {
            tracing::error!(gsi, "the {NAME} engine cannot drive a line: {error}");
        }
    }
}
