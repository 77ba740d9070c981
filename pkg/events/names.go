package events

import "strconv"

// HookName is a hook as iptables and nft call it: "PREROUTING", "INPUT", …
func HookName(pf, hook uint8) string {
	if pf == PFARP && hook <= 2 { // include/uapi/linux/netfilter_arp.h
		return [...]string{"INPUT", "OUTPUT", "FORWARD"}[hook]
	}
	switch hook {
	case HookPreRouting:
		return "PREROUTING"
	case HookLocalIn:
		return "INPUT"
	case HookForward:
		return "FORWARD"
	case HookLocalOut:
		return "OUTPUT"
	case HookPostRouting:
		return "POSTROUTING"
	}
	if pf == PFBridge && hook == 5 {
		return "BROUTING"
	}
	return "hook " + strconv.Itoa(int(hook))
}
