package testenv

// The wire between host and guest.
//
// Down goes one file in the initramfs, specPath. Up go three virtio-serial
// ports: what the command writes to stdout and stderr, byte for byte, and the
// control port, a tar stream with these entries:
//
//	started          the guest's init is up and starts the command
//	file/N, file/N/… what the N-th get names, after the command has ended
//	missing/N        the N-th get names nothing; the content says why
//	exit             JSON of exitReport; the last entry

const (
	specPath = "/.vm/spec.json"

	portOut     = "nftrace.out"
	portErr     = "nftrace.err"
	portControl = "nftrace.ctl"
)

// spec says what the guest is to do.
type spec struct {
	Args []string
	Env  []string
	Dir  string
	Get  []string // paths in the guest to send back
}

// exitReport says how it went.
type exitReport struct {
	Status int    // the command's exit status, if Signal is 0
	Signal int    // the signal that ended the command, or 0
	Error  string // why the command did not run, or ""
	Warned bool   // the kernel issued a warning (taint W)
	Log    string // the kernel's warning, where Warned
}
